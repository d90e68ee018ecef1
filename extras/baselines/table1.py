"""Table 1 of the paper at the scale of two cores: what is missing is run, then the table printed.

    python -m extras.baselines.table1 PTBXL --val-fold 8 --test-fold 9 --out runs/table1
    python -m extras.baselines.table1 PTBXL --val-fold 8 --test-fold 9 --out runs/table1 --tables

PTB-XL at 100 Hz, `small` networks, eight epochs in bf16, the same probe for all.
"""

SMALL = "--size small --sample-rate 100 --amp bf16"
SUPERVISED = f"train_probe.py --finetune --epochs 8 {SMALL}"
ALIGN = "train_pretrain.py --lr 1e-3 --warmup 50 --epochs 8 --amp bf16"
RESNET = "--encoder resnet --lr 1e-3"

# As evidence.RUNS: (name, number of seeds, command).
INDEPENDENT = (
    ("teacher-#", 1, f"{SUPERVISED} --lead all"),
    ("scratch-#", 3, f"{SUPERVISED} --lead I"),
    ("clocs-resnet-12-#", 3, f"extras.baselines.clocs {SMALL} {RESNET} --leads 12"),
    ("clocs-resnet-1-#", 3, f"extras.baselines.clocs {SMALL} {RESNET} --leads 1"),
    ("selfcut-resnet-#", 3, f"extras.baselines.clocs {SMALL} {RESNET} --self-cut"),
    ("simclr-resnet-12-#", 3, f"extras.baselines.simclr {SMALL} {RESNET} --leads 12"),
    ("simclr-resnet-1-#", 3, f"extras.baselines.simclr {SMALL} {RESNET} --leads 1"),
    ("three_kg-resnet-12-#", 3, f"extras.baselines.three_kg {SMALL} {RESNET} --leads 12"),
    ("three_kg-resnet-1-#", 3, f"extras.baselines.three_kg {SMALL} {RESNET} --leads 1"),
    ("simclr-1-#", 1, f"extras.baselines.simclr {SMALL} --leads 1"),
    ("simclr-12-#", 1, f"extras.baselines.simclr {SMALL} --leads 12"),
    ("wav2vec2-1-#", 1, f"extras.baselines.wav2vec2 {SMALL} --leads 1"),
    ("wav2vec2-12-#", 1, f"extras.baselines.wav2vec2 {SMALL} --leads 12"),
    ("three_kg-1-#", 1, f"extras.baselines.three_kg {SMALL} --leads 1"),
    ("three_kg-12-#", 1, f"extras.baselines.three_kg {SMALL} --leads 12"),
    ("clocs-1-#", 1, f"extras.baselines.clocs {SMALL} --leads 1"),
    ("clocs-12-#", 1, f"extras.baselines.clocs {SMALL} --leads 12"),
    ("w2v_cmsc-1-#", 1, f"extras.baselines.w2v_cmsc {SMALL} --leads 1"),
    ("w2v_cmsc-12-#", 1, f"extras.baselines.w2v_cmsc {SMALL} --leads 12"),
    ("st_mem-1-#", 1, f"extras.baselines.st_mem {SMALL} --leads 1"),
    ("st_mem-12-#", 1, f"extras.baselines.st_mem {SMALL} --leads 12"),
    ("heartlang-1-#", 1, f"extras.baselines.heartlang {SMALL} --leads 1"),
    ("heartlang-12-#", 1, f"extras.baselines.heartlang {SMALL} --leads 12"),
)
ALIGNED = (
    ("paper-#", 3, f"{ALIGN} --loss paper --multi @teacher-0"),
    ("softmax-#", 3, f"{ALIGN} --loss softmax --multi @teacher-0"),
    ("paper-free-#", 3, f"{ALIGN} --loss paper --multi @clocs-resnet-12-0"),
    ("softmax-free-#", 3, f"{ALIGN} --loss softmax --multi @clocs-resnet-12-0"),
    ("softmax-start-#", 3, f"{ALIGN} --loss softmax --multi @teacher-0 --single @clocs-resnet-1-#"),
)
