"""The methods that the paper compares SelfMIS with: the same records, the same probe.

    python -m extras.baselines.clocs --data ptb-xl --size small --out runs/clocs
    python train_probe.py --data ptb-xl --encoder runs/clocs/best.pt --lead I --head logistic

Likewise simclr, wav2vec2, three_kg, w2v_cmsc, st_mem and heartlang; without --size small in the
published size and with the published rate.  --leads 1 trains on lead I, --leads 12 on twelve leads,
of which a probe then sees lead I and zeros, as in the paper.  No label is used.  The eighth of
Table 1, ECGFounder, comes trained:

    python train_probe.py --data ptb-xl --encoder 1_lead_ECGFounder.pth

Each file names the paper of its method, and what differs from "the published form": that is the
public code that the SelfMIS paper's parameter counts fit, fairseq-signals for the five on the
conv-transformer, the authors' own for ST-MEM, HeartLang and MCMA, ecg-recon for the three GANs.

Table 2's four, pix2pix, cyclegan, ekgan and mcma, make eleven leads out of lead I; they are trained
in the same way, and generated.py writes and scores what they make.

Beside them crops, supervised training on random halves, and synthetic_pretraining, the second
half of arXiv 2506.23259: pre-training on synthetic records, with their labels or without, for
fine-tuning on few real ones.

common.py holds what all share, losses.py, transformer.py and gan.py what several do; table1.py,
table2.py and synthetic_table.py run everything and print the tables.
"""
