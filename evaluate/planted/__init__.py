"""What an SAE recovers of planted features, on a store that `tcsae synthetic` wrote."""
