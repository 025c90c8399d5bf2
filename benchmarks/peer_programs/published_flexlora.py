"""FlexLoRA as published: one process, one client after the other, its adapter read from a file.

A client gets the global adapter, trains with the Trainer of transformers, and saves its adapter.
The server reads all of them, adds up dense products, and takes a full SVD of each module. Written
from the paper's description.
"""

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from benchmarks.peer_programs.adapters import adapter_of, flexlora, load_model
from benchmarks.peer_programs.work import (
    ClientWork,
    TokenRow,
    peer_folder,
    read_work,
    round_done,
    trained,
)
from benchmarks.rounds import BATCH, RATE, plain_batch


class InOrder(Trainer):
    """Trainer that takes the rows in their order."""

    def _get_train_sampler(self, *_: object, **__: object) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(model: object, client: ClientWork) -> int:
    """Train a client; return the steps that were taken."""
    rows: list[TokenRow] = [row for step in client.steps for row in step]
    settings = TrainingArguments(
        output_dir=str(peer_folder() / "trainer"),
        max_steps=len(client.steps),
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = InOrder(model=model, args=settings, train_dataset=rows, data_collator=plain_batch)
    trainer.train()
    return int(trainer.state.global_step)


def main() -> None:
    """Run all rounds."""
    work = read_work()
    torch.set_num_threads(work.slots)
    model = load_model(work.model)
    adapter = adapter_of(model)
    files = peer_folder() / "adapters"
    files.mkdir()
    for cohort in work.rounds:
        for client in cohort:
            set_peft_model_state_dict(model, adapter)
            trained(client, train(model, client))
            save_file(adapter_of(model), files / f"{client.client}.safetensors")
        rows = sum(client.rows for client in cohort)
        adapter = flexlora(
            (client.rows / rows, load_file(files / f"{client.client}.safetensors"))
            for client in cohort
        )
        round_done()


if __name__ == "__main__":
    main()
