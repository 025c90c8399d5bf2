"""A second user of the group that shares a run, with a Python and a checkout that it can read."""

import pwd
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedllm.storage.trust.secret import STATE_VARIABLE

NAME = "fedllm-chaos"
CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Member:
    """A user who shares a run by its group, which has the same name."""

    name: str
    home: Path
    python: Path
    environment: Mapping[str, str]

    def resume(self, root: Path, log: Path) -> "subprocess.Popen[bytes]":
        """Start `fedllm resume` as this user."""
        words = ["setpriv", f"--reuid={self.name}", f"--regid={self.name}", "--init-groups"]
        run = [str(self.python), "-m", "fedllm", "resume", str(root), "--accept-changes"]
        own = {"HOME": str(self.home), STATE_VARIABLE: str(self.home / "state")}
        with log.open("ab") as out:
            return subprocess.Popen(
                [*words, *run],
                env={**self.environment, **own},
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )


@contextmanager
def member(public: Path, environment: Mapping[str, str]) -> Iterator[Member]:
    """Make the user, and let it read this checkout and Python wherever they lie."""
    home = public / "home"
    words = ["useradd", "--user-group", "--no-create-home", f"--home-dir={home}", NAME]
    subprocess.run(words, check=True)
    mounts = {public / "checkout": CHECKOUT, public / "base": Path(sys.base_prefix)}
    try:
        for place, source in mounts.items():
            place.mkdir()
            subprocess.run(["mount", "--bind", str(source), str(place)], check=True)
        user = pwd.getpwnam(NAME)
        home.mkdir()
        (home / "state").mkdir(mode=0o700)
        for folder in (home, home / "state"):
            subprocess.run(["chown", f"{user.pw_uid}:{user.pw_gid}", str(folder)], check=True)
        yield Member(name=NAME, home=home, python=_python(public), environment=dict(environment))
    finally:
        for place in mounts:
            subprocess.run(["umount", "--lazy", str(place)], check=False)
        subprocess.run(["userdel", NAME], check=True)


def _python(public: Path) -> Path:
    """Write a program that starts Python with this checkout and the packages of the tests."""
    packages = next(Path(place) for place in sys.path if place.endswith("site-packages"))
    checkout = public / "checkout"
    path = [checkout, checkout / packages.relative_to(CHECKOUT)]
    base = public / "base" / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    program = public / "python"
    program.write_text(
        "#!/bin/sh\n"
        # where a shared libpython is not looked for beside the program
        f'export LD_LIBRARY_PATH="{base.parents[1] / "lib"}:$LD_LIBRARY_PATH"\n'
        f'PYTHONPATH="$PYTHONPATH:{":".join(map(str, path))}" exec {base} "$@"\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    return program
