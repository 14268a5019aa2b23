"""What the models of transformers do by themselves, of factorised ones: `from_config`, saving, adapters of PEFT."""
