"""Find and import an engine: probing without importing, and remembering why an import failed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from types import ModuleType

from ..errors import BackendUnavailable
from .base import Availability

# Why an import failed, by module: a package can be installed and still not load (a missing library,
# a build for another CPU), and the next probe has to say so.
_failures: dict[str, str] = {}


@dataclass(frozen=True)
class Engine:
    """A package that a backend needs.

    Args:
        module: what is imported.
        distributions: the distributions that may provide it; the first one found tells the version.
        floor: the oldest version that runs Kiln's graphs, as a tuple.
        extra: the extra of Kiln that installs it.
    """

    module: str
    distributions: tuple[str, ...]
    floor: tuple[int, ...]
    extra: str

    @property
    def advice(self) -> str:
        """What to type to get it."""
        return f"pip install 'kiln-diffusion[{self.extra}]'"

    def probe(self) -> Availability:
        """Whether it is installed, new enough, and has not already failed to load. Imports nothing."""
        try:
            found = importlib.util.find_spec(self.module) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            return Availability(False, f"the package {self.module} is not installed: {self.advice}")
        version = self._version()
        if self.module in _failures:
            return Availability(False, _failures[self.module], version)
        if version and parse_version(version) < self.floor:
            oldest = ".".join(map(str, self.floor))
            return Availability(
                False,
                f"{self.module} {version} is too old, Kiln needs {oldest} or newer: {self.advice}",
                version,
            )
        return Availability(True, "", version)

    def load(self) -> ModuleType:
        """Import it.

        Raises:
            BackendUnavailable: it is not installed, too old, or does not load.
        """
        found = self.probe()
        if not found.available:
            raise BackendUnavailable(found.reason)
        try:
            return importlib.import_module(self.module)
        except Exception as error:  # a broken engine raises anything: ImportError, OSError, RuntimeError
            line = " ".join(str(error).split()) or type(error).__name__
            _failures[self.module] = f"{self.module} is installed but does not load: {line}"
            raise BackendUnavailable(_failures[self.module]) from error

    def _version(self) -> str:
        for name in self.distributions:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return ""


def parse_version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2026.4.1-22982`` gives ``(2026, 4, 1)``."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()
