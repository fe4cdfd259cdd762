"""Fine-tune a split model with transformers' Trainer. Only the lines that load the model differ from any other script.

fedsea serve smollm2-135m --insecure &
python examples/train_with_trainer.py --server 127.0.0.1:7070 --insecure
"""

import argparse

import torch
from peft import LoraConfig
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from fedsea import SplitModelForCausalLM, load_tokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--server", required=True)
parser.add_argument("--credentials")
parser.add_argument("--insecure", action="store_true")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="trainer-output")
arguments = parser.parse_args()

TEXTS = [f"At Lindental clinic, locker {number} belongs to ward {number % 7}." for number in range(64)]

tokenizer = load_tokenizer(arguments.model)
tokenizer.padding_side = "right"  # as training wants it; it comes as generation does
model = SplitModelForCausalLM.from_pretrained(
    arguments.model, server=arguments.server, credentials=arguments.credentials, insecure=arguments.insecure
)
model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))

with model:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            logging_steps=1,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=[{"input_ids": tokenizer(text).input_ids} for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    model.save_adapter(f"{arguments.output}/adapter")
print(f"the adapter is in {arguments.output}/adapter")
