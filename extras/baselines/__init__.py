"""Seven of the eight methods that Table 1 compares SelfMIS with: the same records, the same probe.

    python -m extras.baselines.clocs --data ptb-xl --sample-rate 100 --size small --out runs/clocs
    python train_probe.py --data ptb-xl --encoder runs/clocs/best.pt --lead I --head logistic

Likewise simclr, wav2vec2, three_kg, w2v_cmsc, st_mem and heartlang; without --size small in the
published size, rate and settings.  --leads 1 trains on lead I, --leads 12 on twelve
leads, of which a probe then sees lead I and zeros, as in the paper.  No label is used.  The eighth,
ECGFounder, comes trained: `python train_probe.py --data ptb-xl --encoder 1_lead_ECGFounder.pth`.

common.py holds what all share, losses.py and transformer.py what several do; table1.py runs all
of them and SelfMIS and prints the table.
"""
