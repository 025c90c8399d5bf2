"""Environment variables that a job inherits from who submits it: what its programs need.

A batch system keeps the variables of a job, and administrators can read them. So a variable
travels only if it is in these lists, and never if its name or value may hold a secret.
"""

_NAMES = frozenset(
    (
        # user, shell and language
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TERM"),
        *("TMPDIR", "TMP", "TEMP", "ENV", "BASH_ENV", "MANPATH", "LOCPATH"),
        # folders of sites
        *("SCRATCH", "PSCRATCH", "CSCRATCH", "WORK", "WORKDIR", "PROJECT", "STORE", "DATA"),
        # what compilers of kernels read
        *("CC", "CXX", "LIBRARY_PATH", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"),
        *("PKG_CONFIG_PATH", "CMAKE_PREFIX_PATH"),
        # network of `prepare`
        *("http_proxy", "https_proxy", "all_proxy", "no_proxy"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
        # modules
        *("LOADEDMODULES", "_LMFILES_", "MODULEPATH", "MODULEPATH_ROOT", "MODULESHOME"),
        *("FPATH", "VIRTUAL_ENV"),
    )
)
_PREFIXES = (
    *("LC_", "LD_", "XDG_", "BASH_FUNC_", "FEDLLM_"),
    # modules, environments and containers
    *("MODULES_", "LMOD_", "__LMOD_", "_ModuleTable", "SPACK_", "EBROOT", "EBVERSION"),
    *("CRAY", "PE_"),
    *("CONDA_", "_CE_", "MAMBA_", "PYENV_", "UV_", "APPTAINER", "SINGULARITY"),
    # Python and what computes
    *("PYTHON", "COVERAGE_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "GOTO_"),
    *("ONEDNN_", "DNNL_", "ATEN_", "TORCH", "PYTORCH_", "TRITON_", "DS_", "ACCELERATE_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_", "SAFETENSORS_"),
    *("CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "NVTE_"),
    *("HIP_", "ROCM_", "ROCR_", "HSA_", "MIOPEN_"),
    # communication, and the heap
    *("NCCL_", "RCCL_", "GLOO_", "UCX_", "FI_", "IBV_", "MALLOC_", "GLIBC_"),
    # trackers of the coordinator
    *("WANDB_", "MLFLOW_"),
)
# words in the names of variables that hold secrets
_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
# a library, not a secret
_NO_SECRETS = ("TOKENIZERS_",)


def travels(name: str, value: str) -> bool:
    """Say whether a job inherits a variable."""
    if name not in _NAMES and not name.startswith(_PREFIXES):
        return False
    return not (_is_secret(name) or _has_password(value))


def _is_secret(name: str) -> bool:
    """Say whether a variable seems to hold a secret."""
    words = name.upper()
    for harmless in _NO_SECRETS:
        words = words.removeprefix(harmless)
    return any(word in words for word in _SECRETS)


def _has_password(value: str) -> bool:
    """Say whether a value is an address with a user's name, as of a proxy that asks for one."""
    scheme, found, rest = value.partition("://")
    return bool(found) and scheme.isalnum() and "@" in rest.partition("/")[0]
