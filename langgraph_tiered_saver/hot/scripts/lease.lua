-- After a miss: leave a token that every later change of the hash removes, so that warming cannot overwrite
-- anything newer than what it is about to read (the leases of "Scaling Memcache at Facebook", NSDI 2013).
-- KEYS: hot hash, journal
-- ARGV: token, ttl in ms of a hash that holds nothing else
-- Returns the journal length.
redis.call('HSET', KEYS[1], 'l', ARGV[1])
if not redis.call('HGET', KEYS[1], 'id') then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return redis.call('XLEN', KEYS[2])
