"""train_pretrain.py, whose student sees random halves of its lead, as those of crops.py are.

    python -m extras.halves --data ptb-xl --multi runs/teacher/best.pt --epochs 16 --out runs/halves

Each epoch shows another five seconds of a record at another gain, while the teacher embeds the
whole record as it is.  This is SelfMIS beside extras/baselines/crops.py, supervised training on
halves, which is ahead of that on whole records.  All flags are train_pretrain.py's.
"""

import dataclasses

import selfmis
import train_pretrain
from extras.baselines.common import random_stream
from extras.baselines.crops import random_half
from selfmis import flag
from train_pretrain import PretrainConfig, Training


@dataclasses.dataclass
class HalvesConfig(PretrainConfig):
    out: str = flag("runs/halves", "folder of the run", metavar="DIR")


class HalvesTraining(Training):
    """train_pretrain.py's run on halves; validation is on whole records, and chooses best.pt."""

    kind = "pretrain on halves"

    def step_loss(self, rows, signals, targets):
        draw = random_stream(self.config.seed, self.epoch, self.step, self.ranks.rank)
        return super().step_loss(rows, random_half(signals, draw), targets)


def main(config: HalvesConfig) -> dict:
    return train_pretrain.main(config, HalvesTraining)


if __name__ == "__main__":
    selfmis.run_script(main, HalvesConfig, __doc__)
