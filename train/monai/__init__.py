"""Networks that were trained with MONAI: their weights, and runs made of them."""
