"""Measure a table of a paper, or of the shipped models, beside the published values.

    diffdistill reproduce table=digits_students
    diffdistill reproduce table=diff_solvers_cifar10 dry_run=true
    diffdistill reproduce table=amed_cifar10 make=true fetch=true
    torchrun --nproc_per_node=8 -m diffdistill reproduce table=amed_cifar10

With `make=true` what is missing is fetched and trained first, and what fails does not stop the rest. Running the same
command again continues at the cell where it stopped. Results lie in `out`: index.html, table.md,
table.csv, plot.png, samples.png, and one small file for each cell.
"""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from common.command import command
from common.configs import plain
from common.speed import switches
from diffdistill.devices import device_of
from diffdistill.distributed import barrier, rank
from diffdistill.tables.comparison import side_by_side
from diffdistill.tables.html import write_pages
from diffdistill.tables.making import make_missing
from diffdistill.tables.pages import markdown, status
from diffdistill.tables.planning import dry_run
from diffdistill.tables.reproduction import reproduce
from diffdistill.tables.tables import Table


@command("reproduce")
def main(config: DictConfig) -> None:
    settings = plain(config)
    name = HydraConfig.get().runtime.choices["table"]
    table = Table.from_dict(name, settings["table"])
    folder = Path(settings["out"] or Path("results") / name)
    options = {"device": device_of(settings["device"]), "batch_size": settings["batch_size"]}
    if settings["dry_run"]:
        print(dry_run(table, folder, **options))
        return
    failures = make_missing(table) if settings["make"] and rank() == 0 else []
    barrier()
    options |= {name: settings[name] for name in ("save_samples", "again")}
    so_far = write_pages if settings["make"] and rank() == 0 else None
    outcome = reproduce(table, folder, **options, switches=switches(settings), so_far=so_far)
    if rank() != 0:
        return
    print(markdown(outcome))
    written = write_pages(outcome)
    if settings["side_by_side"]:
        written += side_by_side(outcome, folder, options["device"])
    print(f"written: {', '.join(map(str, written))}")
    for failure in (*failures, *outcome.failures):
        print(f"failed: {failure}")
    if not outcome.results:
        raise FileNotFoundError(f"nothing could be measured. {' '.join(status(outcome)[1:])}")


if __name__ == "__main__":
    main()
