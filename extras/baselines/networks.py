"""The networks of the methods; importing this lets `selfmis.load_encoder` read them."""

import selfmis
from extras.baselines.heartlang import BeatTransformer
from extras.baselines.st_mem import PatchTransformer
from extras.baselines.transformer import ConvTransformer

for network in (BeatTransformer, ConvTransformer, PatchTransformer):
    selfmis.ENCODERS[network.__name__] = network
