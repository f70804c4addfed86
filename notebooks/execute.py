"""Execute the notebooks of this folder in place: python notebooks/execute.py. Stops at the first cell that fails."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> nbformat.NotebookNode:
    """Run every cell afresh and return the notebook with its outputs, free of anything that changes by itself.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(HERE)}}
    )
    client.execute()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return notebook


if __name__ == "__main__":
    for notebook_path in sorted(HERE.glob("*.ipynb")):
        nbformat.write(execute(notebook_path), notebook_path)
        print(notebook_path.name, file=sys.stderr)
