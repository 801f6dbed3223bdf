"""The main job in minutes: a guided teacher becomes one model, and that a model of 16, 8, 4, 2 and 1 steps.

    diffdistill quickstart

Running it again continues an interrupted run.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

import distill_guidance
import distill_steps
from common.checks import check_settings
from common.command import command
from common.configs import changed, compose, plain
from diffdistill.devices import device_of
from diffdistill.tables.comparison import comparison_table, plot_comparison, side_by_side
from diffdistill.tables.html import write_pages
from diffdistill.tables.reproduction import reproduce
from diffdistill.tables.tables import Table


@command("quickstart")
def main(config: DictConfig) -> None:
    settings = plain(config)
    out, teacher = Path(settings["out"]), settings["teacher"]
    stage1_model = out / "stage1/model.safetensors"
    accept = f"accept_changes={settings['accept_changes']}"
    stage1 = [accept, "experiment=digits/quickstart_stage1", f"teacher={teacher}", f"out={out / 'stage1'}"]
    stage2 = [accept, "experiment=digits/quickstart_stage2", f"teacher={stage1_model}", f"out={out / 'stage2'}"]
    first = changed(compose("distill_guidance", stage1), config.stage1)
    second = changed(compose("distill_steps", stage2), config.stage2)
    check_settings(plain(first), "distill_guidance")
    check_settings(plain(second), "distill_steps")
    print("stage 1 of 2: the guided teacher becomes one model", flush=True)
    distill_guidance.distill(first)
    print("stage 2 of 2: that becomes a model of 16, 8, 4, 2 and 1 steps", flush=True)
    distill_steps.distill(second)

    device = device_of(settings["device"])
    print("measuring teacher and students", flush=True)
    outcome = reproduce(Table.from_dict("quickstart", settings["table"]), out / "table", device=device)
    write_pages(outcome)
    plot_comparison(outcome, out / "quality.png")
    side_by_side(outcome, out, device)
    print(f"\n{comparison_table(outcome)}\n")
    print(f"models, pictures, curves and the table lie in {out.resolve()}: begin with table/index.html")


if __name__ == "__main__":
    main()
