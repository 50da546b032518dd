"""PEFT's names, fields and files, with this library's prompts behind them."""
