"""p: decoder, encoder, likelihood and the VAE of them. Torch only; knows nothing of AnnData."""

from scuvae.model.decoder import Decoder
from scuvae.model.encoder import Encoder
from scuvae.model.vae import VAE

__all__ = ["VAE", "Decoder", "Encoder"]
