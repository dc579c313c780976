"""Notebooks run: `execute` in a kernel of this interpreter, `normalise` for committing.

Used by `nvfp4lab study`; what becomes of the notebook that comes back is `publish`'s. Knows nothing
of formats, recipes or plots. May be changed: what else is no result and differs between runs is
taken out in `normalise`.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import hashlib
import io
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

from nvfp4lab import files

_OTHER_PARAMETERS = (
    "A notebook asserts the numbers of its prose, which hold for its own parameters. With others, "
    "take out the assert that stops it."
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that end a run
_PACKAGE = Path(__file__).resolve().parent


class NotebookError(RuntimeError):
    """A notebook that could not be run to its end: which cell, why, and what ran before it."""

    def __init__(self, message: str, *, cell: int, partial: NotebookNode):
        super().__init__(message)
        self.cell = cell  # counted from 1, over all cells
        self.partial = partial  # with the outputs made so far


class _ThisInterpreter(AsyncKernelManager):
    """Starts the kernel with the interpreter that runs us, whatever kernelspecs are registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


class _Client(NotebookClient):
    """Calls `on_start` when nbclient has set its signal handlers and the kernel is to start."""

    on_start: Callable[[], None]

    async def async_start_new_kernel(self, **kwargs: Any) -> None:
        self.on_start()
        await super().async_start_new_kernel(**kwargs)


def execute(
    path: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    timeout: float | None = None,
    on_cell: Callable[[int, int], None] | None = None,
) -> NotebookNode:
    """Run a notebook in a new kernel of this interpreter and return it with its outputs.

    The kernel runs in the notebook's folder, imports this very copy of nvfp4lab, and reads none of
    the user's IPython startup files. The file is not changed.

    parameters: Python literals by name; they replace what the cell tagged `parameters` assigns.
    timeout: seconds for each cell; None waits for ever.
    on_cell: called as on_cell(done, total) before the first code cell and after each.

    Raises NotebookError when a cell fails, times out or loses its kernel; ValueError or TypeError,
    before anything runs, for a parameter that the notebook does not have or that is no literal.
    """
    path = Path(path).resolve()
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        _inject(notebook, parameters, path.name)
    total = sum(_runs(cell) for cell in notebook.cells)
    done, current, interrupted = 0, 0, None
    report = on_cell or (lambda done, total: None)

    def starts(cell: NotebookNode, cell_index: int) -> None:
        nonlocal current
        current = cell_index + 1

    def ends(**_: Any) -> None:
        nonlocal done
        done += 1
        report(done, total)

    def interrupt(task: asyncio.Task, number: int) -> None:
        nonlocal interrupted
        interrupted = number
        client.shutdown_kernel = "immediate"
        task.cancel()

    def listen() -> None:
        """A signal cancels the run; nbclient's own handler takes the kernel from under it."""
        task = asyncio.current_task()
        assert task is not None
        for number in SIGNALS:
            with suppress(RuntimeError, ValueError):  # not the main thread, or Windows
                asyncio.get_running_loop().add_signal_handler(number, interrupt, task, number)

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    report(0, total)
    with files.scratch(tempfile.gettempdir()) as scratch, _handlers_kept():
        connection = {"connection_file": str(scratch / "kernel.json")}
        if os.name == "posix":
            connection["transport"] = "ipc"  # sockets in that folder: no port is opened
        client = _Client(
            notebook,
            config=Config(ConnectionFileMixin=connection),
            kernel_name="python3",
            kernel_manager_class=_ThisInterpreter,
            timeout=timeout,
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_start=starts,
            on_cell_executed=ends,
        )
        search = [str(_PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {
            "IPYTHONDIR": str(scratch),
            "PYTHONPATH": os.pathsep.join(filter(None, search)),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences a debugger warning at start
        }
        client.on_start = listen
        try:
            client.execute(env=env)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            if interrupted is None:
                _join_streams(notebook)
                where = f"{path.name}, cell {current} of {len(notebook.cells)}"
                what = _explain(error, notebook.cells[current - 1], timeout)
                raise NotebookError(f"{where}: {what}", cell=current, partial=notebook) from None
        except (Exception, asyncio.CancelledError):  # the latter while the kernel starts
            if interrupted is None:
                raise
    if interrupted is not None:
        signal.raise_signal(interrupted)  # now that nothing is left, to whom it was for
        raise KeyboardInterrupt
    _join_streams(notebook)
    return notebook


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Take out, in place, what differs from one run to the next and is no result; return it.

    Cells are numbered 1..n in order, metadata keeps only tags and folding, the kernel is plain
    `python3`; memory addresses, the kernel's process id in warnings, and the random ids of styled
    pandas tables are replaced, and pictures have 256 colours, a third of the bytes. The digest of
    its cells is noted, so that outputs which are older than the cells are found. Running it twice
    changes nothing more.
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
            "nvfp4lab": {"outputs_of": digest(notebook)},
        }
    )
    count = 0
    for cell in notebook.cells:
        kept = {k: v for k, v in cell.metadata.items() if k in ("tags", "jupyter", "editable")}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type != "code":
            continue
        count += _runs(cell)
        cell.execution_count = count if _runs(cell) else None
        for position, output in enumerate(cell.outputs):
            if output.output_type == "execute_result":
                output.execution_count = count
            texts = output.get("data", output)
            for kind in texts.keys() & {"text", "text/plain"}:
                text = re.sub(r"\b0x[0-9a-f]{8,16}\b", "0x…", texts[kind])
                texts[kind] = re.sub(r"\S*ipykernel_\d+/\d+\.py", "<cell>", text)
            if picture := texts.get("image/png"):
                texts["image/png"] = _in_256_colours(picture)
            if markup := texts.get("text/html"):
                own = rf"\g<1>{count}-{position}"
                texts["text/html"] = re.sub(r'(["#]T_)[0-9a-f]{5}(?=[_" ])', own, markup)
    return notebook


def digest(notebook: NotebookNode) -> str:
    """Sixteen hexadecimal digits that differ when the source of a code cell does."""
    sources = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def first_figure(notebook: NotebookNode) -> bytes | None:
    """The PNG of the first picture among the outputs, None where there is none."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                return base64.b64decode(picture)
    return None


def _in_256_colours(picture: str) -> str:
    """A PNG in base64, opaque, of at most 256 colours: what figures of lines and marks need."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "P":
        return picture
    page = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    small = io.BytesIO()
    page.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Gives the signals that end a run back to whom they were for; asyncio does not."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(TypeError, ValueError):  # set outside Python; not the main thread
                signal.signal(number, handler)


def _runs(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and bool(cell.source.strip())


def _inject(notebook: NotebookNode, parameters: Mapping[str, Any], name: str) -> None:
    """Add a cell that assigns `parameters` after the one tagged `parameters`, folded as that is."""
    cells = notebook.cells
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{name} has {len(tagged)} cells tagged 'parameters'; expected one")
    names = {
        node.id
        for node in ast.walk(ast.parse(cells[tagged[0]].source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    if unknown := sorted(set(parameters) - names):
        raise ValueError(f"{name} has no parameter {unknown}; it has {sorted(names)}")
    for key, value in parameters.items():
        try:
            ast.literal_eval(repr(value))
        except (ValueError, SyntaxError):
            given = type(value).__name__
            raise TypeError(f"parameter {key} must be a Python literal, given {given}") from None
    source = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    folding = {k: v for k, v in cells[tagged[0]].metadata.items() if k == "jupyter"}
    cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell(source, metadata=folding))


def _explain(error: Exception, cell: NotebookNode, timeout: float | None) -> str:
    if isinstance(error, CellExecutionError):
        failed = [out for out in cell.outputs if out.output_type == "error"]
        lines = failed[-1].traceback if failed else [str(error)]
        if error.ename == "AssertionError":
            lines = [*lines, _OTHER_PARAMETERS]
        return f"{error.ename}: {error.evalue}\n" + strip_ansi("\n".join(lines))
    quoted = "\n".join(f"    {line}" for line in cell.source.splitlines())
    if isinstance(error, CellTimeoutError):
        return f"not done after {timeout:g} s\n{quoted}"
    return f"the kernel died (out of memory, or a crash in compiled code)\n{quoted}"


def _join_streams(notebook: NotebookNode) -> None:
    """Join neighbouring pieces of one stream, and keep what a carriage return leaves visible."""
    for cell in notebook.cells:
        joined: list[NotebookNode] = []
        for output in cell.get("outputs", []):
            if joined and output.output_type == "stream" and output.name == joined[-1].get("name"):
                joined[-1].text += output.text
            else:
                joined.append(output)
        for output in joined:
            if output.output_type == "stream":
                output.text = re.sub(r".*\r(?=[^\n])", "", output.text)
        if cell.cell_type == "code":
            cell.outputs = joined
