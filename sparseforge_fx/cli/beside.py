"""Measurements of a run's folder, which go beside its report and onto its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console


class Beside(NamedTuple):
    """Where a measurement goes (None: nowhere), and the run's folder whose page shows it (None: there is none)."""

    file: Path | None
    run: Path | None

    @classmethod
    def of(cls, model: str, name: str, given: Path | None) -> Beside:
        """The file that was named, or ``name`` in the folder of a run. Raises SparseForgeError if it cannot be
        written."""
        from sparseforge_fx.files import check_parent

        folder = Path(model) if (Path(model) / "report.json").is_file() else None
        file = given if given is not None or folder is None else folder / name
        if file is not None:
            if file.is_dir():
                raise IsADirectoryError(f"{file} is a folder: name a file")
            check_parent(file)
        inside = file is not None and folder is not None and file.resolve().parent == folder.resolve()
        return cls(file, folder if inside else None)

    def write(self, content: dict[str, Any], console: Console) -> None:
        from sparseforge_fx.report import write_json

        if self.file is None:
            return
        write_json(self.file, content)
        console.print(f"wrote {self.file}", highlight=False)
        self.show(console)

    def show(self, console: Console) -> None:
        """Make the run's page again, if there is one."""
        from sparseforge_fx.page.page import write_page

        if self.run is not None:
            console.print(f"wrote {write_page(self.run)}", highlight=False)
