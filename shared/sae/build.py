"""The module of a config, of whatever kind."""

from tcsae.shared.sae.layout import SaeConfig
from tcsae.shared.sae.module import SparseAutoencoder
from tcsae.shared.sae.persistent import PersistentAutoencoder
from tcsae.shared.sae.temporal_features import TemporalFeatureAutoencoder


def new_sae(config: SaeConfig) -> SparseAutoencoder:
    """An SAE of this kind, all weights zero but an attention's."""
    if config.predictor == "decay":
        return PersistentAutoencoder(config)
    return TemporalFeatureAutoencoder(config) if config.attends else SparseAutoencoder(config)
