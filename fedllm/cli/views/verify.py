"""`fedllm verify`: check every record, digest and state of a run."""

import typer

from fedllm.cli.options import AsJson, RunFolder, say, say_json
from fedllm.errors import RunDirectoryError, counted
from fedllm.reporting.status.verification import verify_run
from fedllm.storage.paths import RunPaths


def verify(run: RunFolder, json_: AsJson = False) -> None:
    """Check every record, digest and state of a run directory.

    Nothing is changed. Exit code 3: `fedllm resume` repairs what is damaged; 2: you have to.
    """
    paths = RunPaths(root=run.resolve())
    if not paths.run.exists() and not paths.config.exists():
        raise RunDirectoryError(
            f"{run}: no run here (neither run.json nor config.yaml); give the directory of a run"
        )
    found = verify_run(paths)
    names = [str(finding.path.relative_to(paths.root)) for finding in found.findings]
    if json_:
        say_json(
            {
                "files": found.files,
                "findings": [
                    {"path": name, "problem": f.problem, "remedy": f.remedy, "resumes": f.resumes}
                    for name, f in zip(names, found.findings, strict=True)
                ],
            }
        )
    else:
        for name, finding in zip(names, found.findings, strict=True):
            say(f"{name}: {finding.problem}; to do: {finding.remedy}")
        say(
            f"{counted(found.files, 'file')} checked, {len(found.findings)} not as they were "
            "written"
        )
    if found.exit_code:
        raise typer.Exit(found.exit_code)
