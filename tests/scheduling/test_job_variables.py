"""A job inherits what its programs need, and no secret."""

import pytest

from fedllm.scheduling.job_variables import travels


@pytest.mark.parametrize(
    "name",
    [
        *(
            "PATH",
            "HOME",
            "LANG",
            "LC_ALL",
            "LD_LIBRARY_PATH",
            "TMPDIR",
            "SCRATCH",
            "XDG_CACHE_HOME",
        ),
        *("MODULEPATH", "LMOD_CMD", "_ModuleTable001_", "BASH_FUNC_module%%", "EBROOTPYTHON"),
        *("CONDA_PREFIX", "VIRTUAL_ENV", "APPTAINER_BIND", "PYTHONPATH", "OMP_NUM_THREADS"),
        *("TOKENIZERS_PARALLELISM", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"),
        *("NCCL_SOCKET_IFNAME", "PYTORCH_CUDA_ALLOC_CONF", "FEDLLM_STATE", "GLIBC_TUNABLES"),
        *("https_proxy", "NO_PROXY", "SSL_CERT_FILE"),
    ],
)
def test_a_job_inherits_what_its_programs_need(name: str) -> None:
    assert travels(name, "/a:/b")


@pytest.mark.parametrize(
    "name",
    [
        # secrets by name, also of what travels otherwise
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"),
        *("CONDA_TOKEN", "APPTAINER_DOCKER_PASSWORD", "TOKENIZERS_TOKEN", "FEDLLM_key"),
        # of nobody's concern
        *("AWS_PROFILE", "SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "MY_LOGIN"),
        *("SLURM_JOB_ID", "SBATCH_EXPORT", "RANK", "OLDPWD", "PS1"),
    ],
)
def test_a_job_inherits_no_secret_and_nothing_else(name: str) -> None:
    assert not travels(name, "x")


def test_an_address_with_a_password_stays() -> None:
    assert travels("https_proxy", "http://proxy.site:3128")
    assert not travels("https_proxy", "http://me:pw@proxy.site:3128")
    assert travels("PYTHONPATH", "/home/a@b:/c")
