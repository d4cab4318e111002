def run(argv):
    from roberta_fast.training.pretraining import prepare
    return prepare.run(argv[1:])
