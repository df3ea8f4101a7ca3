"""k-sparse probing with labels that the store holds for free: from token ids, their text, and the corpus."""
