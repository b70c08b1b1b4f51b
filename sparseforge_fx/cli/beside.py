"""Measurements of a run's folder, which go beside its report and onto its page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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

    def write(self, save: Callable[[Path], None], tell: Callable[[], None], console: Console) -> None:
        """Write the measurement, then print it: whoever reads what is printed may stop, and what cannot be written is
        printed all the same.

        Args:
            save: makes the file; the run's page follows, if there is one.
            tell: prints the measurement.
        """
        from sparseforge_fx.page.page import write_page

        written: list[Path] = []
        try:
            if self.file is not None:
                save(self.file)
                written.append(self.file)
            if self.run is not None:
                written.append(write_page(self.run))
        finally:
            tell()
        for file in written:
            console.print(f"wrote {file}", highlight=False)
