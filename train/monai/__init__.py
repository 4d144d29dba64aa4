"""Import of networks that were trained with MONAI: their weights, and runs made from them."""
