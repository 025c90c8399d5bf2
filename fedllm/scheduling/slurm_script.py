"""What a task's script exports before it starts our program."""

import shlex

from fedllm.scheduling.seam import Job
from fedllm.scheduling.slurm_commands import clean_environment

# Where libraries keep what they compiled: thousands of small files that a shared home suffers from.
_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "CUDA_CACHE_PATH": "cuda",
    "XDG_CACHE_HOME": "cache",
}
# `prepare` fetches: what it need not fetch again stays where it is
_FETCHED = {"HF_HOME": "huggingface"}


def exports(job: Job) -> list[str]:
    """Return the lines that tell a task who it is and what it inherits, whatever `--export`."""
    folder = shlex.quote(str(job.log_folder.resolve()))
    inherited = {
        name: value
        for name, value in sorted(clean_environment().items())
        if name.startswith("FEDLLM_")
    }
    caches = _CACHES
    if job.program != "prepare":
        inherited["HF_HUB_OFFLINE"] = "1"
        caches = _CACHES | _FETCHED
    return [
        'export FEDLLM_TASK="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        f'export FEDLLM_LOG={folder}/"${{FEDLLM_TASK}}_0_log.out"',
        *(f"export {name}={shlex.quote(value)}" for name, value in inherited.items()),
        *_scratch(),
        *(f'export {name}="${{{name}:-$fedllm_scratch/{kind}}}"' for name, kind in caches.items()),
    ]


def _scratch() -> list[str]:
    """Return the lines that find a folder of our own on the node's disk, for all our jobs there.

    Code is run from it: one that somebody else made first is not used.
    """
    return [
        'fedllm_scratch="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/fedllm-$(id -u)"',
        'mkdir -p -m 700 "$fedllm_scratch"',
        '[ -O "$fedllm_scratch" ] || fedllm_scratch="$(mktemp -d)"',
    ]
