"""Methods to compare with: a small file each, the same records, the same probe.

Importing this package lets `selfmis.load_encoder` read their networks.
"""

import selfmis
from extras.baselines.transformer import ConvTransformer

selfmis.ENCODERS["ConvTransformer"] = ConvTransformer
