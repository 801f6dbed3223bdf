"""The main job in minutes: a guided teacher becomes one model, and that a model of 16, 8, 4, 2 and 1 steps.

    python scripts/quickstart.py

Running it again continues an interrupted run.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import distill_guidance
import distill_steps
from common import command, compose, plain
from diffdistill import load_denoiser
from diffdistill.atomic import write_text
from diffdistill.data import load_data
from diffdistill.evaluation.comparison import compare, comparison_table, plot_comparison, rows_as_dicts, side_by_side
from diffdistill.generation import plan

SHOWN = (16, 8, 4, 2, 1)


@command("quickstart")
def main(config: DictConfig) -> None:
    settings = plain(config)
    out, teacher = Path(settings["out"]), settings["teacher"]
    stage1 = ["experiment=digits/quickstart_stage1", f"teacher={teacher}", f"out={out / 'stage1'}"]
    guided = distill_guidance.distill(OmegaConf.merge(compose("distill_guidance", stage1), config.stage1))
    stage2 = ["experiment=digits/quickstart_stage2", f"teacher={guided}", f"out={out / 'stage2'}"]
    students = distill_steps.distill(OmegaConf.merge(compose("distill_steps", stage2), config.stage2))

    steps = settings["teacher_steps"]
    plans = {
        f"guided teacher, DDIM {steps} steps": partial(plan, load_denoiser(teacher), num_steps=steps),
        f"stage 1, DDIM {steps} steps": partial(plan, load_denoiser(guided), num_steps=steps),
    }
    for n in SHOWN:
        plans[f"stage 2, {n} step{'s' * (n > 1)}"] = partial(plan, load_denoiser(students[n]))

    rows = compare(plans, settings["w"], load_data("digits"), num_samples=settings["num_samples"])
    table = comparison_table(rows)
    write_text(out / "table.md", table + "\n")
    write_text(out / "table.json", json.dumps(rows_as_dicts(rows), indent=1) + "\n")
    plot_comparison(rows, out / "quality.png")
    for w in settings["w"]:
        side_by_side(plans, w, out / f"samples_w{w:g}.png")
    print(f"\n{table}\n")
    print(f"models, pictures, curves and the table lie in {out.resolve()}")


if __name__ == "__main__":
    main()
