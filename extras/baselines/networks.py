"""The networks of the methods; importing this lets `selfmis.load_encoder` read them."""

import selfmis
from extras.baselines.heartlang import BeatTransformer
from extras.baselines.st_mem import PatchTransformer
from extras.baselines.synthetic_pretraining import PatchRecurrent, TokenTransformer
from extras.baselines.transformer import ConvTransformer

NETWORKS = (BeatTransformer, ConvTransformer, PatchRecurrent, PatchTransformer, TokenTransformer)

for network in NETWORKS:
    selfmis.ENCODERS[network.__name__] = network
