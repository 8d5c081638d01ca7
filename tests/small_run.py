"""A run of a very small Llama on made-up tokens: what the loop does, without its surroundings."""

from functools import partial

import torch
import torch.distributed as dist

from parallel.config import PrecisionConfig
from parallel.disks import one_disk
from parallel.optimizer_state import ADAMW
from trainer.config import PretrainConfig
from trainer.model import Materializer, build_meta_model, prepare_training
from trainer.model_config import NamedModelConfig
from trainer.optim import AdamWConfig
from trainer.storage import Generation, Storage


def saved_to(folder, world):
    """Storage on one disk, claimed by this start; what a Checkpointer takes."""
    storage = Storage(folder, world, one_disk(world))
    return storage, Generation.claim(storage, 0)


GLOBAL_BATCH, SEQ_LEN, VOCAB = 16, 32, 128

MODEL = NamedModelConfig(
    model_type="llama",
    vocab_size=VOCAB,
    config={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
)

PRETRAIN = PretrainConfig()


class SmallRun:
    """Two micro-batches a step on every rank, clipping at 0.5."""

    def __init__(
        self,
        parallel,
        world,
        model=MODEL,
        precision=None,
        checkpointing=False,
        objective=PRETRAIN,
    ):
        self.world = world
        self.model = build_meta_model(model, VOCAB)
        self.module = objective.build(self.model, model, tokenizer_fingerprint="")
        prepare_training(self.model, compile=False, checkpointing=checkpointing)
        matrices = {n for n, p in self.model.named_parameters() if p.ndim >= 2}
        self.strategy = parallel.build(world, precision or PrecisionConfig())
        materializer = Materializer(self.module, self.model, model, seed=3, device=world.device)
        self.strategy.setup(
            self.module,
            self.module.materialize_with(materializer, world.device),
            partial(AdamWConfig(lr=3e-3, max_norm=0.5).build, decayed=matrices),
            ADAMW,
            materializer.sparse,
        )
        self.step = 0

    def train(self, num_steps):
        """[(loss, gradient norm)] of the next steps."""
        return [self._train_step() for _ in range(num_steps)]

    def _train_step(self):
        tokens = _batch(self.step)
        micro = GLOBAL_BATCH // self.world.world_size // 2
        mine = tokens.view(2, self.world.world_size, micro, SEQ_LEN + 1)[:, self.world.rank]
        total = torch.zeros(())
        for i, batch in enumerate(mine):
            with self.strategy.accumulate(last=i == 1):
                loss = self.strategy.forward(input_ids=batch[:, :-1], targets=batch[:, 1:])
                self.strategy.backward(loss / (GLOBAL_BATCH * SEQ_LEN))
            total += loss.detach()
        norm = self.strategy.step(0.5)
        dist.all_reduce(total)
        self.step += 1
        return total.item() / (GLOBAL_BATCH * SEQ_LEN), norm.item()


def _batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCAB // 4, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
