"""The data room: corpus, tokenizer, n-gram baseline, and the batches a run reads."""
