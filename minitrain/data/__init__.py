"""The data room: corpus, tokenizer, n-gram baseline, and the batches a run reads.

`prepare` is the door; the rest stands in the order in which it calls them. `verbs` knows the forms, `corpus`
makes sentences and splits of them, `manifest` says what was written, `reading` checks every row that comes
in, `tokenizer` turns text into ids, `ngram` sets the bar, and `batches` deals out rows by seed and step.
"""
