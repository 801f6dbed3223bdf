"""Write a guidance-distilled student as a folder that stock diffusers runs.

diffdistill export model=runs/stage2/stages/004 teacher=models/stable-diffusion out=models/four-steps
"""

from __future__ import annotations

from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from diffdistill import load_denoiser
from diffdistill.interop.diffusers import export_student, load_pipeline


@command("export")
def main(config: DictConfig) -> None:
    settings = plain(config)
    student, teacher = load_denoiser(settings["model"]), load_pipeline(settings["teacher"])
    print(f"the pipeline is {export_student(student, teacher, settings['out'], adapters=settings['adapters'])}")


if __name__ == "__main__":
    main()
