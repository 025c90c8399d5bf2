"""Natural Instructions as 1,613 clients: parquet files from the JSON files of the FlexLoRA paper.

    python examples/natural_instructions.py FederatedScope/data/1613 natural-instructions
    fedllm run configs/natural-instructions-small.yaml \
        --set model.path=MODEL --set data.path=natural-instructions

The first folder is `data/1613` of the FlexLoRA branch of https://github.com/alibaba/FederatedScope.
"""

import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = {"training": "train", "eval": "validation", "test": "test"}
TEXTS = ["category", "instruction", "input", "output"]
SCHEMA = pa.schema([("client_id", pa.int32()), *((name, pa.string()) for name in TEXTS)])


def convert(source: Path, out: Path) -> None:
    """Write one file per split; one client per task, whose name the category lost."""
    out.mkdir(parents=True, exist_ok=True)
    for theirs, ours in SPLITS.items():
        files = {
            int(file.stem.rpartition("_")[2]): file
            for file in source.glob(f"local_{theirs}_*.json")
        }
        if not files:
            sys.exit(f"{source}: no files local_{theirs}_*.json; name the folder data/1613")
        with pq.ParquetWriter(out / f"{ours}.parquet", SCHEMA, compression="zstd") as writer:
            for client in sorted(files):
                rows = json.loads(files[client].read_text(encoding="utf-8"))
                for row in rows:
                    row["client_id"] = client
                    # "Text Matching 7.json" is the seventh task of its category
                    row["category"] = re.sub(r" \d+\.json$", "", row["category"])
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("need two folders: python examples/natural_instructions.py SOURCE OUT")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
