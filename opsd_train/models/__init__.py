"""Models: loading one, the adapter around it, its LM head, its backbone, its weights sharded.

Whatever knows about transformers' models, PEFT, LM heads or FSDP lives here. How a model is sampled
from is in sampling/, and who is teacher and who is student in opsd/.
"""

from opsd_train.models.adapter import (
    Student,
    adapter_config,
    adapter_sha256,
    adapter_weights,
    add_adapter,
    base_model,
    base_weights_sha256,
    check_not_merged,
    load_adapter,
    peft_name,
    read_lora_config,
    saved_weights,
    sha256,
    train_all,
)
from opsd_train.models.head import (
    Backbone,
    check_logits,
    check_same_vocabulary,
    lm_head,
    vocab_size,
)
from opsd_train.models.loading import (
    check_ids,
    end_ids,
    load_config,
    load_model,
    load_tokenizer,
    save_model,
    settle_padding,
)
from opsd_train.models.memory import (
    call_with_full_parameters,
    copy_full,
    full_tensor,
    save_memory,
    shard,
    tile_mlps,
)
