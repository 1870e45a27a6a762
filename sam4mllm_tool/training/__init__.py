"""How the shipped models were made, and how to train further: scenes, base, dialogues, LoRA."""
