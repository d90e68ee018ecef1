"""The methods of extras/baselines and their settings, by the names of their files."""

from extras.baselines import clocs, crops, heartlang, simclr, st_mem, three_kg, w2v_cmsc, wav2vec2
from extras.baselines import cyclegan, ekgan, mcma, pix2pix, synthetic_pretraining

METHODS = {
    "simclr": (simclr.SimCLR, simclr.SimCLRConfig),
    "wav2vec2": (wav2vec2.Wav2Vec2, wav2vec2.Wav2Vec2Config),
    "three_kg": (three_kg.ThreeKG, three_kg.ThreeKGConfig),
    "clocs": (clocs.CLOCS, clocs.ClocsConfig),
    "w2v_cmsc": (w2v_cmsc.W2VCMSC, w2v_cmsc.W2VCMSCConfig),
    "st_mem": (st_mem.STMEM, st_mem.STMEMConfig),
    "heartlang": (heartlang.HeartLang, heartlang.HeartLangConfig),
    "crops": (crops.Crops, crops.CropsConfig),
    "synthetic_pretraining": (
        synthetic_pretraining.SyntheticPretraining,
        synthetic_pretraining.SyntheticPretrainingConfig,
    ),
}
GENERATIVE = {
    "pix2pix": (pix2pix.Pix2Pix, pix2pix.Pix2PixConfig),
    "cyclegan": (cyclegan.CycleGAN, cyclegan.CycleGANConfig),
    "ekgan": (ekgan.EKGAN, ekgan.EKGANConfig),
    "mcma": (mcma.MCMA, mcma.MCMAConfig),
}
