"""The command `diffdistill`: `diffdistill sample ...` runs `scripts/sample.py`, and so on for every script.

`scripts/` and `configs/` lie at the top of the repository; in an installed package they lie beside this file.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path

from diffdistill import __version__

USAGE = """diffdistill {version}: fast sampling from diffusion models.

{commands}

diffdistill COMMAND --help shows the settings of a command, which are given as name=value."""


def scripts_folder() -> Path:
    """Where the scripts lie: beside this file in an installed package, at the top of the repository in a checkout."""
    here = Path(__file__).resolve().parent
    places = (here / "scripts", here.parents[1] / "scripts")
    found = next((folder for folder in places if (folder / "sample.py").is_file()), None)
    if found is None:
        sys.exit(f"error: this installation holds no scripts: they are neither in {places[0]} nor in {places[1]}")
    return found


def commands(folder: Path) -> dict[str, Path]:
    """The scripts by the names of their commands: `distill-steps` is `distill_steps.py`."""
    return {path.stem.replace("_", "-"): path for path in sorted(folder.glob("*.py"))}


def usage(known: dict[str, Path]) -> str:
    """All commands with the first line of what each says of itself."""
    width = max(map(len, known))
    lines = []
    for name, path in known.items():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<{width}}  {doc.partition(chr(10))[0]}")
    return USAGE.format(version=__version__, commands="\n".join(lines))


def main() -> None:
    """Run the command that `sys.argv` names; without one, list those there are."""
    program = "python -m diffdistill" if Path(sys.argv[0]).name == "__main__.py" else "diffdistill"
    folder = scripts_folder()
    known = commands(folder)
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(usage(known))
        return
    if name == "--version":
        print(__version__)
        return
    script = known.get(name.replace("_", "-"))
    if script is None:
        near = difflib.get_close_matches(name, known, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        print(f"error: unknown command {name!r}{guess}: choose one of {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"{program} {name}", *sys.argv[2:]]
    sys.path.insert(0, str(folder))  # as Python does for a script
    importlib.import_module(script.stem).main()


if __name__ == "__main__":
    main()
