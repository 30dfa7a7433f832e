"What a recipe is made into: images, network, optimizer, schedule"
from nwrepro.training.build import make_views
from nwrepro.training.sources import load_source
from nwrepro.training.recipe import make_recipe

def test_the_images_in_memory_share_one_limit():
    digits = load_source('digits')
    views = make_views(make_recipe(dict(arch='resnet18', train_images=500), digits), digits)
    limits = [v.limit for v in (views.train, views.train_eval, views.val)]
    assert 0 < min(limits) and abs(sum(limits)-2**30) < 1
    assert [round(limit/limits[0], 3) for limit in limits] == [round(len(v)/len(views.train), 3) for v in (views.train, views.train_eval, views.val)]
