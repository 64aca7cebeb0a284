"""The scores of a game: a deferred application of App Engine's, moved. Beside the imports nothing of it has changed."""

from google.cloud import ndb  # was: from google.appengine.ext import ndb

from safedefer import deferred  # was: from google.appengine.ext import deferred

BATCH = 20


class Player(ndb.Model):
    name = ndb.StringProperty()
    points = ndb.IntegerProperty(default=0)
    level = ndb.IntegerProperty(default=0)
    friends = ndb.KeyProperty(repeated=True)

    def congratulate(self, mark="!"):
        """A method of an entity, which travels with it."""
        Letter(text=f"{self.name}, level {self.level}{mark}", to=self.key).put()


class Letter(ndb.Model):
    text = ndb.StringProperty()
    to = ndb.KeyProperty()


class Report(ndb.Model):
    players = ndb.IntegerProperty()
    points = ndb.IntegerProperty()


def recompute(cursor=None, players=0, points=0):
    """Set the level of each player, a page at a time: the task defers itself with the cursor of the next page."""
    page, cursor, more = Player.query().order(Player.key).fetch_page(BATCH, start_cursor=cursor)
    for player in page:
        level = player.points // 100
        if level > player.level:
            player.level = level
            deferred.defer(player.congratulate)
    ndb.put_multi(page)
    players += len(page)
    points += sum(player.points for player in page)
    if more:
        deferred.defer(recompute, cursor, players, points)
    else:
        # An entity that is not stored yet, and a method that ndb defines: main.py names it in the policy.
        deferred.defer(Report(id="latest", players=players, points=points).put)


def give(keys, points):
    """Add points to the players of these keys."""
    players = ndb.get_multi(keys)
    for player in players:
        player.points += points
    ndb.put_multi(players)


@ndb.transactional()
def award(key, points):
    """Add points, and tell the player: both, or neither."""
    player = key.get()
    player.points += points
    player.put()
    deferred.defer(tell, key, f"+{points}", _transactional=True)
    if points > 1_000:
        raise ValueError("not so many at once")


def tell(key, text):
    """Write a letter."""
    Letter(text=text, to=key).put()


def remove(kind, key):
    """Delete an entity; the first argument is its model class."""
    if key.kind() == kind.__name__:
        key.delete()
