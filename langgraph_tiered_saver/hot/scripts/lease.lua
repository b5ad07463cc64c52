-- After a miss: leave a token that every later change of the hash removes, so that warming cannot overwrite
-- anything newer than what it is about to read (the leases of "Scaling Memcache at Facebook", NSDI 2013).
-- KEYS: hot hash, journal, namespaces, shard
-- ARGV: token, namespace, ttl in ms of what holds nothing else, generation
-- Returns the journal length.
local generation = redis.call('HGET', KEYS[4], 'g')
if generation ~= ARGV[4] then
  return redis.error_reply('TIEREDGENERATION the generation here is ' .. (generation or 'unknown'))
end
local known = redis.call('HMGET', KEYS[1], 'g', 'id')
if known[1] ~= generation then
  renew(KEYS[1], generation, known[1])
  known = {}
end
redis.call('HSET', KEYS[1], 'g', generation, 'l', ARGV[1])
-- A delete finds the hash, and with it the token, by the set of namespaces.
local added = redis.call('SADD', KEYS[3], ARGV[2])
if not known[2] then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
local life = redis.call('PTTL', KEYS[3])
local fresh = added == 1 and redis.call('SCARD', KEYS[3]) == 1
if fresh or (life >= 0 and life < tonumber(ARGV[3])) then redis.call('PEXPIRE', KEYS[3], ARGV[3]) end
return redis.call('XLEN', KEYS[2])
