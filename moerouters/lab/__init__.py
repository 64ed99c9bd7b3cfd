"""The lab: one small MoE language model, trained once per router on the same text, and a report about it.

Reading order: settings, presets (what is trained), corpus, batches (on what), model, train, evaluate (how), roster
(under which routers), compare (the whole job), results, summary, pictures, report (what comes out). `import moerouters`
does not import it; matplotlib and jinja2 come with the extra `moerouters[lab]` and are imported where they are used.
"""
