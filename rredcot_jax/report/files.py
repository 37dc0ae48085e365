"""Files that are replaced whole: a reader, or a process killed meanwhile, never leaves half of one."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from rredcot_jax.report.text import visible


def check_target(path: str | os.PathLike, *, directory: bool = False) -> Path:
  """`path`, which is to be a file, or a `directory`, and is not there yet or is one.

  Raises:
    ValueError: if it is something else, such as a device, which a file of its name would take the place of.
  """
  path = Path(path)
  if os.path.lexists(path) and not (path.is_dir() if directory else path.is_file()):
    kind = "a directory" if path.is_dir() else "a file" if path.is_file() else "a device, a pipe or a link to nothing"
    wanted = "a directory" if directory else "a file"
    raise ValueError(f"{visible(str(path))} is {kind}, and {wanted} is written there: choose another path.")
  return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
  """Yields the path of a new, empty file beside `path`; it takes the place of `path` when the block ends.

      with replacing("values.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, values=values)

  The content is on the disk (fsync) before the file gets its name. If the block raises, or the
  replacement does, `path` keeps what it held and the temporary file is removed. The temporary file
  ends in ".tmp", so a writer that takes the format from the name has to be told the format.

  Args:
    path: a file, there already or not; its folder must exist. It gets the permission bits of a newly made file.

  Raises:
    OSError: if the folder is not there or the disk refuses.
    ValueError: see `check_target`.
  """
  path = check_target(path)
  temporary = path.with_name(f".{path.name[:32]}.{secrets.token_hex(4)}.tmp")
  with open(temporary, "xb") as file:
    mode = os.fstat(file.fileno()).st_mode
  try:
    yield temporary
    os.chmod(temporary, mode)  # A writer may have put a private file in its place, as safetensors does.
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
  """Replaces the file at `path` by `content`, as `replacing` does; text as UTF-8 with the line ends that it has."""
  data = content.encode() if isinstance(content, str) else content
  with replacing(path) as temporary:
    temporary.write_bytes(data)
