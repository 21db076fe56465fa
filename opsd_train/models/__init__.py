"""Models: loading one, the adapter around it, its LM head, its backbone, its weights sharded.

Whatever knows about transformers' models, PEFT, LM heads or FSDP lives here. How a model is sampled
from is in sampling/, and who is teacher and who is student in opsd/.
"""

from opsd_train.models.adapter import Student as Student
from opsd_train.models.adapter import adapter_config as adapter_config
from opsd_train.models.adapter import adapter_sha256 as adapter_sha256
from opsd_train.models.adapter import adapter_weights as adapter_weights
from opsd_train.models.adapter import add_adapter as add_adapter
from opsd_train.models.adapter import base_model as base_model
from opsd_train.models.adapter import base_weights_sha256 as base_weights_sha256
from opsd_train.models.adapter import check_not_merged as check_not_merged
from opsd_train.models.adapter import load_adapter as load_adapter
from opsd_train.models.adapter import peft_name as peft_name
from opsd_train.models.adapter import read_lora_config as read_lora_config
from opsd_train.models.adapter import saved_weights as saved_weights
from opsd_train.models.adapter import sha256 as sha256
from opsd_train.models.adapter import train_all as train_all
from opsd_train.models.head import Backbone as Backbone
from opsd_train.models.head import check_logits as check_logits
from opsd_train.models.head import check_same_vocabulary as check_same_vocabulary
from opsd_train.models.head import lm_head as lm_head
from opsd_train.models.head import vocab_size as vocab_size
from opsd_train.models.loading import check_ids as check_ids
from opsd_train.models.loading import end_ids as end_ids
from opsd_train.models.loading import load_config as load_config
from opsd_train.models.loading import load_model as load_model
from opsd_train.models.loading import load_tokenizer as load_tokenizer
from opsd_train.models.loading import save_model as save_model
from opsd_train.models.loading import settle_padding as settle_padding
from opsd_train.models.memory import call_with_full_parameters as call_with_full_parameters
from opsd_train.models.memory import copy_full as copy_full
from opsd_train.models.memory import full_tensor as full_tensor
from opsd_train.models.memory import save_memory as save_memory
from opsd_train.models.memory import shard as shard
from opsd_train.models.memory import tile_mlps as tile_mlps
