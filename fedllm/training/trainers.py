"""The trainers there are, by the name of the engine that `planning.grouping.engine_of` gives."""

from collections.abc import Mapping

from fedllm.training.plain import Plain
from fedllm.training.together import Together
from fedllm.training.trainer import OpenTrainer

TRAINERS: Mapping[str, OpenTrainer] = {"plain": Plain, "together": Together}
