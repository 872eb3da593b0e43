"""Executes notebooks and strips them: python notebooks/execute.py [FILE ...]

Every cell has to run; what it showed is written to `build/notebooks/` for a reader,
and the file itself is left without outputs, so that a diff shows changes of substance.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SHOWN = HERE.parent / "build" / "notebooks"
SECONDS = 600


def execute(path: Path) -> Path:
    """Runs all cells in the repository's root and writes the result; strips `path`.

    Raises:
      CellExecutionError: A cell failed; the message shows which.
    """
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(HERE.parent)}}
    NotebookClient(notebook, timeout=SECONDS, resources=folder).execute()
    SHOWN.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, SHOWN / path.name)
    strip(notebook)
    nbformat.write(notebook, path)
    return SHOWN / path.name


def strip(notebook: nbformat.NotebookNode) -> None:
    """Removes outputs, counts and the versions of whoever ran it."""
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}}
    )


def main() -> None:
    """Executes the notebooks that are named, or all of this folder."""
    paths = list(map(Path, sys.argv[1:])) or sorted(HERE.glob("*.ipynb"))
    if not paths:
        sys.exit("there is no notebook to execute")
    for path in paths:
        print(execute(path))


if __name__ == "__main__":
    main()
