"""Golden figures of temporal feature analysis: what SAELens 6.54.12's TemporalSAE makes of random weights.

python tests/bench/peers_tfa.py      # in an environment with sae-lens; writes tests/golden/peers_tfa.safetensors
"""

from pathlib import Path

import safetensors.torch
import torch
from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig

D, F, K, HEADS, LAYERS, BOTTLENECK, SCALE = 6, 24, 3, 2, 2, 2, 0.7


def main() -> None:
    torch.manual_seed(0)
    config = TemporalSAEConfig(
        d_in=D,
        d_sae=F,
        n_heads=HEADS,
        n_attn_layers=LAYERS,
        bottleneck_factor=BOTTLENECK,
        kval_topk=K,
        normalize_activations="constant_scalar_rescale",
        activation_normalization_factor=SCALE,
        apply_b_dec_to_input=True,
    )
    sae = TemporalSAE(config)
    torch.nn.init.normal_(sae.b_dec)
    x = 3 * torch.randn(4, 9, D)
    with torch.no_grad():
        novel, predicted = sae.encode_with_predictions(x)
        tensors = {f"weights.{name}": tensor for name, tensor in sae.state_dict().items()}
        tensors |= {"x": x, "novel": novel, "predicted": predicted, "x_hat": sae(x)}
    path = Path(__file__).parent.parent / "golden" / "peers_tfa.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    print(f"{path.name}: {sorted(tensors)}")


if __name__ == "__main__":
    main()
