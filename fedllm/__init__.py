"""Federated LoRA fine-tuning across clients of different ranks, as batch jobs."""
