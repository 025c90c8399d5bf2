"""The fuzz suite: `make fuzz N=2000`. Without FUZZ_N, as in `make test`, nothing of it runs."""

import os

collect_ignore_glob = [] if os.environ.get("FUZZ_N") else ["test_*.py"]
