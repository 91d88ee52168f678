# A recipe for data of one's own: with --data the schedule follows from the number of images that are found, and the
# learning rate from the batch. What is also given by --cfg-options stays as given (docs/own_data.md, "Recipes").
recipe = dict(
    passes=40,  # how often each training image is seen,
    iterations=(1000, 20_000),  # but at least and at most so many steps
    evaluations=10,
    rare=None,  # 0.1: images with a class that fewer than a tenth of the images have are repeated
    full_learning_rate=None,  # the learning rate where the whole backbone trains
    early_stopping=None,  # 3: ends when three evaluations in a row have brought nothing better
)
