"""What a quantization gives back: the network, the method that made it, and the report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dither.errors import DitherError, InputError
from dither.evaluation.exam import Exam, Progress
from dither.methods.base import Method
from dither.models.network import Network
from dither.recipe import to_yaml
from dither.storage import write_json, write_network, write_text
from dither.unfinished import check_output


@dataclass
class Report:
    """The report data; `save` writes it as HTML or JSON, whichever the suffix says."""

    data: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write the report.

        Raises:
            InputError: the suffix is neither .html nor .json.
            StorageError: the path cannot be written.
        """
        file = Path(path)
        if file.suffix not in (".html", ".json"):
            raise InputError(f"a report is .html or .json, got {str(path)!r}")
        if file.suffix == ".json":
            write_json(self.data, file)
            return
        from dither.report.html import write_html  # brings matplotlib, which only a report needs

        write_html(self.data, file)


@dataclass
class Result:
    """A quantized network, the method that made it and the report."""

    network: Network
    method: Method
    report: Report

    @property
    def model(self) -> nn.Module:
        """The quantized model."""
        return self.network.model

    def save(self, folder: str | Path) -> None:
        """Write the folder that `dither.load` and `from_pretrained` open; it is read back and compared.

        Raises:
            InputError: the folder holds something else already.
            StorageError: writing or verification failed.
        """
        check_output(Path(folder))
        self._write(Path(folder))

    def _write(self, folder: Path) -> None:
        write_network(self.network, folder)
        write_text(to_yaml(self.method), folder / "recipe.yaml")
        write_json(self.report.data["provenance"], folder / "provenance.json")
        self._write_report(folder)

    def _write_report(self, folder: Path) -> None:
        self.report.save(folder / "report.json")
        self.report.save(folder / "report.html")

    def evaluate(self, exam: Exam, folder: Path | None, progress: Progress | None = None) -> None:
        """Put an evaluation into the report, and into the one saved in `folder`; a failure leaves that as it is.

        Raises:
            DitherError: the evaluation failed; a note says where the result is.
        """
        try:
            self.report.data["evaluation"] = exam.mark(self.network, progress).to_json()
        except DitherError as error:
            if folder is not None:
                error.add_note(f"the quantized model is saved in {str(folder)!r}")
            raise
        if folder is not None:
            self._write_report(folder)
