-- After a miss: leave a token that every later change of the hash removes, so that warming cannot overwrite
-- anything newer than what it is about to read (the leases of "Scaling Memcache at Facebook", NSDI 2013).
-- KEYS: hot hash, journal, namespaces
-- ARGV: token, namespace, ttl in ms of what holds nothing else
-- Returns the journal length.
redis.call('HSET', KEYS[1], 'l', ARGV[1])
-- A delete finds the hash, and with it the token, by the set of namespaces.
local added = redis.call('SADD', KEYS[3], ARGV[2])
if not redis.call('HGET', KEYS[1], 'id') then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
local life = redis.call('PTTL', KEYS[3])
local fresh = added == 1 and redis.call('SCARD', KEYS[3]) == 1
if fresh or (life >= 0 and life < tonumber(ARGV[3])) then redis.call('PEXPIRE', KEYS[3], ARGV[3]) end
return redis.call('XLEN', KEYS[2])
