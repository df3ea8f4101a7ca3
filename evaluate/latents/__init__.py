"""What the latents of an SAE are worth: what ablating and steering them does, what repeats, what text says of them."""
